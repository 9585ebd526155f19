"""Access control without HTTP: API keys, roles and quotas."""
