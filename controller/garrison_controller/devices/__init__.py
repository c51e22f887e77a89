"""Boards: enrolment, certificates, revocation, target filters."""
