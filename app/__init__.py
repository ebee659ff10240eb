"""The HTTP side: routes by topic, users, settings, front end and logs. `server.PromptServer` puts them together."""
