"""OpenAI's Images API below /v1, as far as a class-conditional model can support it: thin adapters to a SampleSpec."""
