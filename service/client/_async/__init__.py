"""The half of the client that does I/O: its connections and the calls made over them."""
