"""The kinds of examples: which fields they have, and what each is made into.

May import `data.chats`.
"""
