"""KServe's inference protocol, V2, below /v2: thin adapters to POST /sample."""
