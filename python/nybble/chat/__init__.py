"""Chat templates: messages to prompts."""
