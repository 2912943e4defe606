"""The demonstration's own small multi-head model and the text it was trained on."""
