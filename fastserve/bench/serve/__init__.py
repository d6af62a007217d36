"""`fastserve bench serve`: an open-loop load generator for any OpenAI-compatible server.

From the bottom up: `http` and `sse` parse what a server sends, `answer` counts its tokens, `exchange` is one job on the
wire, `replay` a whole run of them, `results` what it comes to; `plan` says what is sent when, `target` whereto,
`experiment` how often, and `comparison`, `tables` and `plots` tell it.
"""
