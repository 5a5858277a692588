"""Load a model, look into it, save it. `loading` is where to begin."""
