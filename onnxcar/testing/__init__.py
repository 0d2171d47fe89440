"""Conformance suites: subclass one in your tests, give it your plug-in, and inherit every test."""
