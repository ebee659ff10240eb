"""Real servers with several ranks as subprocesses, and clients that talk to them over HTTP and WebSocket."""
