"""Who made a model: OpenSSF model signatures (v1.0, key mode), verified with ``cryptography`` alone.

A bundle is a DSSE envelope around an in-toto statement that lists every file of a model folder with its SHA-256. It is
evidence of where the files come from, never the right to install them: that is the release signers' alone.

Sources: OpenSSF model-signing specification v1.0 and model-signing 1.1.1, whose own bundles the tests verify; DSSE v1;
in-toto Statement v1.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from pathlib import PurePosixPath

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from garrison_protocol.canonical import sha256_hex
from garrison_protocol.envelope import pae
from garrison_protocol.errors import InvalidError, RefusedError
from garrison_protocol.ids import SHA256_PATTERN
from garrison_protocol.manifest import Manifest, ModelSignature

MAX_BUNDLE_BYTES = 16 * 1024 * 1024
MAX_KEY_BYTES = 4096
_BUNDLE = "application/vnd.dev.sigstore.bundle"
_STATEMENT = "application/vnd.in-toto+json"
_PREDICATE = "https://model_signing/signature/v1.0"
_HASHES: dict[str, hashes.HashAlgorithm] = {
    "secp256r1": hashes.SHA256(),
    "secp384r1": hashes.SHA384(),
    "secp521r1": hashes.SHA512(),
}


def sign_off(manifest: Manifest, bundle: bytes, public_key_pem: str) -> ModelSignature:
    """Return what the manifest shall say of ``bundle``, once it was found to cover exactly the manifest's files.

    Raises:
        RefusedError: ``provenance.bad_signature``, ``provenance.files_differ``.
        InvalidError: ``provenance.malformed``, ``provenance.key_unsupported``.
    """
    if len(bundle) > MAX_BUNDLE_BYTES:
        raise _malformed(f"it has more than {MAX_BUNDLE_BYTES} bytes")
    check_files(manifest, verify_bundle(bundle, public_key_pem))
    return ModelSignature(
        bundle_sha256=sha256_hex(bundle),
        bundle_size=len(bundle),
        public_key_pem=public_key_pem,
        key_sha256=_fingerprint(_public_key(public_key_pem)),
    )


def check_signature(manifest: Manifest, bundle: bytes) -> None:
    """Refuse a manifest whose model signature, kept in ``bundle``, does not hold; one without a signature passes.

    Raises:
        GarrisonError: As ``sign_off``; RefusedError ``provenance.files_differ`` also if ``bundle`` or the key's
            fingerprint is not what the manifest names.
    """
    stated = manifest.provenance.signature
    if stated is None:
        return
    if sign_off(manifest, bundle, stated.public_key_pem) != stated:
        raise RefusedError(
            "provenance.files_differ",
            f"{manifest.id} names another bundle or key than the ones that were verified",
            hint="pack it again with the maker's bundle and key",
        )


def verify_bundle(bundle: bytes, public_key_pem: str) -> dict[str, str]:
    """Return the SHA-256 of every file that ``bundle`` lists, by name, if the key signed exactly this list.

    Raises:
        RefusedError: ``provenance.bad_signature``.
        InvalidError: ``provenance.malformed``, ``provenance.key_unsupported``.
    """
    public = _public_key(public_key_pem)
    try:
        document = json.loads(bundle)
        envelope = document["dsseEnvelope"]
        payload = base64.b64decode(envelope["payload"], validate=True)
        (signature,) = envelope["signatures"]
        sig = base64.b64decode(signature["sig"], validate=True)
        if not document["mediaType"].startswith(_BUNDLE) or envelope["payloadType"] != _STATEMENT:
            raise ValueError("another kind of bundle")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _malformed("it is no Sigstore bundle with one signature") from error
    try:
        public.verify(sig, pae(_STATEMENT, payload), ec.ECDSA(_HASHES[public.curve.name]))
    except InvalidSignature as error:
        raise RefusedError(
            "provenance.bad_signature",
            "the model's bundle is not signed by this key",
            hint="get bundle and key from the model's maker, over two ways",
        ) from error
    try:
        return _files(json.loads(payload))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _malformed(f"its statement is not of version 1.0: {error}") from error


def check_files(manifest: Manifest, signed: dict[str, str]) -> None:
    """Refuse a manifest that has other files than those that were ``signed``, be it one more or one less.

    A signed name is a file's path in the package, or ``<variant>/<path>`` where two variants share a path.

    Raises:
        RefusedError: ``provenance.files_differ``.
    """
    covered = set[str]()
    for variant in manifest.variants:
        for file in variant.files:
            names = [name for name in (file.path, f"{variant.name}/{file.path}") if signed.get(name) == file.sha256]
            if not names:
                raise _differ(f"the bundle does not list {variant.name}/{file.path} with this content")
            covered.update(names)
    if left := sorted(signed.keys() - covered):
        raise _differ(f"the bundle lists {left[0]}, and the package has no such file")


def _files(statement: dict[str, object]) -> dict[str, str]:
    predicate = statement["predicate"]
    subjects = statement["subject"]
    if statement["predicateType"] != _PREDICATE or not isinstance(predicate, dict) or not isinstance(subjects, list):
        raise ValueError("another predicate")
    how = predicate["serialization"]
    if how["method"] != "files" or how["hash_type"] != "sha256" or how.get("allow_symlinks") is True:
        raise ValueError("files must be listed whole, by SHA-256, without links")
    found: dict[str, str] = {}
    for resource in predicate["resources"]:
        name, digest = resource["name"], resource["digest"]
        if resource["algorithm"] != "sha256" or re.fullmatch(SHA256_PATTERN, digest) is None:
            raise ValueError(f"{name!r} has no SHA-256")
        pure = PurePosixPath(name)
        if name != str(pure) or pure.is_absolute() or ".." in pure.parts or name in found:
            raise ValueError(f"{name!r} is no plain path, or listed twice")
        found[name] = digest
    whole = hashlib.sha256(b"".join(bytes.fromhex(digest) for digest in found.values())).hexdigest()
    (subject,) = subjects
    if not found or subject["digest"] != {"sha256": whole}:
        raise ValueError("the subject's digest does not follow from the files")
    return found


def _public_key(pem: str) -> ec.EllipticCurvePublicKey:
    try:
        if len(pem) > MAX_KEY_BYTES:
            raise ValueError("too long")
        public = serialization.load_pem_public_key(pem.encode())
    except (ValueError, UnsupportedAlgorithm) as error:
        raise _unsupported("this is no public key in PEM") from error
    if not isinstance(public, ec.EllipticCurvePublicKey) or public.curve.name not in _HASHES:
        raise _unsupported("the key is not on P-256, P-384, or P-521")
    return public


def _fingerprint(public: ec.EllipticCurvePublicKey) -> str:
    return sha256_hex(public.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo))


def _unsupported(what: str) -> InvalidError:
    return InvalidError(
        "provenance.key_unsupported", what, hint="model-signing signs with keys on P-256, P-384, or P-521"
    )


def _malformed(what: str) -> InvalidError:
    return InvalidError(
        "provenance.malformed",
        f"the model's bundle cannot be used: {what}",
        hint="take what `model_signing sign key` wrote",
    )


def _differ(what: str) -> RefusedError:
    return RefusedError(
        "provenance.files_differ",
        what,
        hint="pack every signed file under its signed name, and no other: --file NAME=PATH",
    )
