"""The syntaxes of tool calls. Each reads calls and writes the grammar of a call."""
