"""Responses: JSON documents, errors, job progress and the OpenAPI document."""
