"""Who may call: API keys and how often each may."""
