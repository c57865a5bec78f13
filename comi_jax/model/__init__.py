"""The paper: from token ids to memory and answers."""
