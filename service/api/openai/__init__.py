"""OpenAI's Images API below /v1, as far as a class-conditional model can offer it. A thin layer over sampling jobs."""
