"""Write converted checkpoints: what will be written, how each tensor comes about, and how a killed run resumes."""
