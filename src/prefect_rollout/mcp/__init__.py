"""The MCP server: an assistant plans, starts and follows releases."""
