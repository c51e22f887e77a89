"""The parts of the agent's state, each in one module and changed by the owner thread only."""
