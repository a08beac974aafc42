"""Invented module of the toy catalog: read as text by the tests, never run. Its functions are in evidence/."""
