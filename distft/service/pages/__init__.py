"""The control room: the pages of the server at `/`. They call what the API calls, and are read without a script."""
