"""One module per kin group. Facts were read from the transformers classes of the same ``model_type``."""
