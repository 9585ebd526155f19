"""Who may ask, and how much: keys, roles and quotas. No HTTP."""
