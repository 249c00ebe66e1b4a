"""Evaluations: tasks with checkers, on instances no training document contains."""
