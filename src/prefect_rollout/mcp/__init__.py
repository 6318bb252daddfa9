"""The MCP server: an assistant releases, watches and explains.

`tools` declares what a client sees; the rest does the work. Importing `tools` imports no Prefect.
"""
