"""The PersistenceGuardian: audits generated source before it may become a method.

    source -> parse -> mends of its outside -> shape and policy -> covenant and its mend -> Audit

A lint that explains, not a wall: the wall is the hand. The guardian runs in a hand too, since parsing is an
attack surface; so nothing here imports more than the standard library, and of BAT OS only its own parts.
"""

from __future__ import annotations

import ast
import unicodedata
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace

from uvm.guardian.findings import Audit, Finding, TooComplex
from uvm.guardian.mends import Mend, add_self, keep_covenant, send_recursion
from uvm.guardian.modules import ALLOWED_MODULES
from uvm.guardian.policy import check_policy
from uvm.guardian.scopes import signature
from uvm.guardian.shape import check_shape, find_method, takes_self
from uvm.guardian.text import Text

__all__ = ["ALLOWED_MODULES", "MAX_SOURCE_BYTES", "Audit", "Finding", "PersistenceGuardian"]

MAX_SOURCE_BYTES = 64 * 1024
# Deeper trees could exhaust the interpreter's stack; ordinary methods stay below 40.
MAX_DEPTH = 200
# As many as a model can act on at once.
MAX_FINDINGS = 20
# A mended source is audited anew: once for each kind of mend, and a last time that must find nothing.
MAX_ROUNDS = 3


class PersistenceGuardian:
    """Audits the source of one method: its shape, the policy, the Persistence Covenant."""

    def audit_code(self, source: str, selector: str, parameters: Sequence[str] | None) -> Audit:
        """Judges a source, and mends what can be mended by rule.

        Args:
            source: any text; at most `MAX_SOURCE_BYTES` as UTF-8.
            selector: the name that the method must have.
            parameters: the names that its parameters must have, without `self`; None leaves them free.

        Returns:
            The audit. It is deterministic, and no text makes this raise.
        """
        if parameters is not None:
            parameters = [unicodedata.normalize("NFKC", name) for name in parameters]
        try:
            return _audit(source, unicodedata.normalize("NFKC", selector), parameters, MAX_ROUNDS)
        except (RecursionError, MemoryError, TooComplex):
            return Audit(source, (_too_complex(),), (), "")


def _audit(source: str, selector: str, parameters: Sequence[str] | None, rounds: int) -> Audit:
    tree = _parse(source)
    if isinstance(tree, Finding):
        return Audit(source, (tree,), (), "")
    method = find_method(tree, selector)
    if method is None:
        return Audit(source, _tidy(check_shape(tree, None, selector, parameters)), (), "")
    text = Text(source)
    edits, findings = _mend_outside(text, tree, method, parameters)
    if not edits:
        findings += [*check_shape(tree, method, selector, parameters), *check_policy(tree, method)]
    if not findings:
        edits, findings = keep_covenant(text, tree, method)
    names = signature(method)[1:] if takes_self(method) else signature(method)
    audit = Audit(source, _tidy(findings), names, ast.get_docstring(method) or "")
    return _proved(audit, text.apply(edits), selector, parameters, rounds) if edits else audit


def _mend_outside(
    text: Text, tree: ast.Module, method: ast.FunctionDef, parameters: Sequence[str] | None
) -> Mend:
    edits, findings = add_self(text, method, parameters)
    more_edits, more_findings = send_recursion(text, tree, method)
    return edits + more_edits, findings + more_findings


def _proved(audit: Audit, mended: str, selector: str, parameters: Sequence[str] | None, rounds: int) -> Audit:
    """Returns the audit of a mended source as one of the submitted source; mends count if they are enough."""
    if not rounds:
        return replace(audit, findings=tuple(replace(finding, mended=False) for finding in audit.findings))
    again = _audit(mended, selector, parameters, rounds - 1)
    if again.ok:
        return replace(again, findings=_tidy([*audit.findings, *again.findings]))
    return replace(again, source=audit.source, findings=tuple(f for f in again.findings if not f.mended))


def _parse(source: str) -> ast.Module | Finding:
    if len(source.encode("utf-8", "surrogatepass")) > MAX_SOURCE_BYTES:
        return Finding("size", 1, f"Write a method of at most {MAX_SOURCE_BYTES // 1024} KB.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an odd literal is a warning, and no reason to refuse
            tree = ast.parse(source)
            # Some errors, such as a `break` outside a loop, are only found by the compiler.
            compile(tree, "<method>", "exec", dont_inherit=True)
    except SyntaxError as error:
        return Finding("syntax", max(1, error.lineno or 1), f"Correct the syntax of this line: {error.msg}.")
    except ValueError:
        return Finding("syntax", 1, "Remove the characters that no Python source may hold.")
    return _too_complex() if _is_deeper(tree, MAX_DEPTH) else tree


def _is_deeper(tree: ast.AST, limit: int) -> bool:
    level = [tree]
    for _ in range(limit):
        level = [child for node in level for child in ast.iter_child_nodes(node)]
    return bool(level)


def _too_complex() -> Finding:
    return Finding(
        "complexity", 1, "Write this in fewer and simpler steps, because it is too complex to be checked."
    )


def _tidy(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    return tuple(sorted(dict.fromkeys(findings), key=lambda finding: finding.line)[:MAX_FINDINGS])
