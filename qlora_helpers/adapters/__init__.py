"""Adapters on disk (`files`), merged into their base (`merge`, `file_merge`), and what that does to it (`drift`)."""
