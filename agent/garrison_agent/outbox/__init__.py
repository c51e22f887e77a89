"""What a board has to tell, kept until a signed receipt says that the controller committed it."""
