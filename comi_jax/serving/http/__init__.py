"""The server: OpenAI's HTTP interface in front of one engine thread. Needs the extra [serve]."""
