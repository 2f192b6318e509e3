"""What a conversation is. Nothing in here knows a framework, a database or HTTP."""
