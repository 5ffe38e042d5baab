"""Audits: Invertible + batch -> AuditResult."""
