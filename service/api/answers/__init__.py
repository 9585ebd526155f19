"""Responses: JSON documents, errors, the progress of jobs, and the OpenAPI document."""
