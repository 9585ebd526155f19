# Generated from service/client/_async/__init__.py by tests/unasync.py. Change that file and run `make client`.
"""The half of the client that does I/O: its connections and the calls made over them."""
