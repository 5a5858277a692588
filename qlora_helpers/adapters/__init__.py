"""Adapters as `files`, merging one into its base (`merge`, `file_merge`), and how far that moves the model (`drift`)."""
