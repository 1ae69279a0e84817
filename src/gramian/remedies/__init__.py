"""Remedies: what to do about a finding, done on a copy and rehearsed before it is offered."""

from gramian.remedies.inspecting import inspect
from gramian.remedies.performing import Setting, perform
from gramian.remedies.proposals import proposals
from gramian.remedies.rehearsing import rehearse
from gramian.remedies.verifying import verified

__all__ = ["Setting", "inspect", "perform", "proposals", "rehearse", "verified"]
