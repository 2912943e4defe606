"""The paper's experiments at a size that a small machine finishes: `python -m recipes.paper --data FOLDER`."""
