"""The demonstration's own small parent model and the text it was trained on."""
