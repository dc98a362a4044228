"""What the engine has generated → the objects and events of OpenAI's API."""
