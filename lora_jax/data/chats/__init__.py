"""Chats → token ids and which of them are trained, through a model's chat template.

`messages` reads the forms in which data has them, `template` renders them with borders, `chat`
encodes them, and `clock` keeps a template's time. Imports nothing else of the project.
"""
