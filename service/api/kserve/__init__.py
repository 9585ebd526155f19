"""KServe's inference protocol, V2, below /v2: thin adapters onto what POST /sample does."""
