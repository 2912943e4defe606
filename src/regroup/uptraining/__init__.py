"""Continued pre-training of a converted checkpoint: the paper's recipe at α, and distillation."""
