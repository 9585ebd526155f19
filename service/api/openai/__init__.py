"""OpenAI's Images API below /v1, as far as a model of classes can mean it: thin adapters onto a SampleSpec."""
