"""A policy on one machine, robots elsewhere: REST and websocket server (`python -m serving`), and clients for it."""
