"""Secure aggregation: the server learns the sum of the clients' vectors, and nothing else about any one of them.

Every client adds masks to its vector, modulo 2³², that are as random as a one-time pad. Of each pair of clients one
adds and the other subtracts the same *pair mask*: in the sum they cancel. On top comes an *own mask*, which the server
can remove only with the help of many clients. In case a client goes silent, it first gives shares of its secrets to the
others (Shamir): any `threshold` clients together can restore a secret, fewer know nothing about it.

    1 keys      client → server: two public keys; the server passes everybody's on
    2 shares    client → server → other clients: shares of the own mask's seed and of the pair masks' private key,
                encrypted for the one who is to keep them
    3 masked    client → server: vector + own mask ± a pair mask for every other client
    4 answers   the server says whose message arrived. Client → server: of each of those the share of the own seed, of
                each that fell silent the share of the private key. Never both of one client

The last line is why there are two kinds of masks. Of a slow client that the server takes for gone, or calls gone, the
pair masks are restored; when its message comes after all, its own mask still hides it. And as the threshold is more
than half of the clients, the server cannot ask one half for one secret of a client and the other half for the other.

The server is curious but keeps to the protocol, and so do the clients. Against a server that lies about *keys* these
would have to be signed (the paper's section 6.2 and its consistency round), which is left out here.

Source: Bonawitz et al., "Practical Secure Aggregation for Privacy-Preserving Machine Learning" (2017), figure 4.
Key agreement X25519, derivation HKDF-SHA256, masks ChaCha20, shares encrypted with ChaCha20-Poly1305, all from
`cryptography`; Shamir's sharing over GF(2¹²⁸) from `pycryptodome`. This file sends nothing: `secure_sum` carries the
messages between ranks.
"""

import secrets
import struct

import torch
from Crypto.Protocol.SecretSharing import Shamir
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from .checks import check_enough, check_threshold

MESSAGES = ("keys", "shares", "masked", "answers")  # what a client sends, in this order
KEY_BYTES, SHARE_BYTES = 64, 64  # two public keys; three shares of 16 bytes and the seal that they are unaltered
HALF, FIELD = 2**31, 2**32


# ---- one client -----------------------------------------------------------------------------------------------


class Client:
    """One client in one round. It sends `keys`, `shares`, `masked`, `answers`, in this order and each once.

    number     its number, the same for everybody; clients are told apart and put in order by it.
    clients    how many there are; threshold: how many have to answer so that the sum can be unmasked.

    Raises RuntimeError for a message out of turn, ValueError for shares that were altered, a vector that the masks do
    not cover and a threshold that hides nothing, TooFewClients where so few are left that the sum is lost.
    """

    def __init__(self, number, clients, threshold):
        check_threshold(clients, threshold)
        self.number, self.clients, self.threshold = number, clients, threshold
        self.channel_private, self._channel_public = _key_pair()  # for the shares' envelopes
        self.private, self._public = _key_pair()  # for the pair masks
        self.seed = secrets.token_bytes(16)  # of the own mask
        self._kept, self._sent = {}, []

    def keys(self):
        """The two public keys, 64 bytes."""
        self._sends("keys", "a round has one pair of keys for each client")
        return self._channel_public + self._public

    def shares(self, keys):
        """{client: 64 bytes that only it can open}. keys: {client: its 64 bytes}, with this client's own."""
        self._sends("shares", "two letters under one key would show what they differ in")
        check_enough(keys, range(self.clients), self.threshold, "sent keys")
        self._keys = keys
        order = sorted(keys)
        secrets_of_16 = self.seed, self.private[:16], self.private[16:]
        pieces = [Shamir.split(self.threshold, len(order), secret) for secret in secrets_of_16]
        sealed = {}
        for i, other in enumerate(order):
            three = b"".join(piece[i][1] for piece in pieces)
            if other == self.number:
                self._kept[other] = three
            else:
                sealed[other] = self._envelope(self.number, other).encrypt(bytes(12), three, None)
        return sealed

    def masked(self, vector, shares):
        """The masked vector, int32. vector: `encode`d, (d,). shares: {client: what it sent for this one}."""
        if vector.dtype != torch.int32 or vector.dim() != 1:
            raise ValueError(
                f"client {self.number} masks a flat vector of int32, as encode gives it, not {vector.dtype} of shape "
                f"{list(vector.shape)}: others would be cut short, or have rows under one and the same mask"
            )
        self._sends("masked", "a second vector under the same masks would show both")
        for other, box in shares.items():
            try:
                self._kept[other] = self._envelope(other, self.number).decrypt(bytes(12), box, None)
            except InvalidTag:
                raise ValueError(f"client {self.number}: the shares from client {other} were altered") from None
        check_enough(self._kept, self._keys, self.threshold, "sent shares")
        total = add(vector, own_mask(self.seed, len(vector)))
        for other in self._kept:
            if other != self.number:
                mask = pair_mask(self.private, self._keys[other][32:], self.number, other, len(vector))
                total = add(total, mask)
        return total

    def answers(self, arrived):
        """{client: share}: of each whose message arrived 16 bytes of its seed, of the others 32 of its private key.

        arrived: the clients of which the server has a masked vector.
        """
        self._sends("answers", "two answers could give both secrets of a client")
        check_enough(arrived, self._kept, self.threshold, "sent their vectors")
        return {c: three[:16] if c in arrived else three[16:] for c, three in self._kept.items()}

    def _sends(self, message, once):
        due = MESSAGES[len(self._sent) :]
        if message in self._sent:
            raise RuntimeError(f"client {self.number} has sent its {message}: {once}")
        if message != due[0]:
            raise RuntimeError(f"client {self.number} sends its {due[0]} before its {message}: {', '.join(MESSAGES)}")
        self._sent.append(message)

    def _envelope(self, sender, receiver):
        """The cipher for one direction between two clients; its key is used for one message."""
        other = receiver if sender == self.number else sender
        mine = X25519PrivateKey.from_private_bytes(self.channel_private)
        secret = mine.exchange(X25519PublicKey.from_public_bytes(self._keys[other][:32]))
        return ChaCha20Poly1305(_derive(secret, b"shares" + struct.pack("<II", sender, receiver)))


# ---- the server -----------------------------------------------------------------------------------------------


def unmask(masked, keys, sharers, answers, threshold):
    """The sum modulo 2³², int32, of the vectors that arrived.

    masked   {client: its masked vector}
    keys     {client: 64 bytes}, as they were passed on; their order numbers the shares
    sharers  the clients whose shares were passed on: those are the ones that masked vectors count on
    answers  {client: its answers}, of at least `threshold` clients

    Raises TooFewClients where fewer answered.
    """
    check_enough(answers, masked, threshold, "answered")
    share_of = {client: i for i, client in enumerate(sorted(keys), 1)}  # Shamir numbers shares from 1
    helpers = sorted(answers)[:threshold]

    def restored(client, start, end):
        return Shamir.combine([(share_of[h], answers[h][client][start:end]) for h in helpers])

    size = len(next(iter(masked.values())))
    total = add(*masked.values())
    for client in masked:
        total = add(total, negative(own_mask(restored(client, 0, 16), size)))
    for gone in set(sharers) - set(masked):  # the others' pair masks with it have nothing to cancel against
        private = restored(gone, 0, 16) + restored(gone, 16, 32)
        for client in masked:
            total = add(total, negative(pair_mask(private, keys[client][32:], client, gone, size)))
    return total


# ---- masks ----------------------------------------------------------------------------------------------------


def _derive(secret, purpose):
    return HKDF(SHA256(), 32, None, purpose).derive(secret)


def own_mask(seed, size):
    """`size` numbers of 32 bits that look random to all who do not know the 16 bytes of the seed."""
    return _stream(_derive(seed, b"own mask"), size)


def pair_mask(private, public, me, other, size):
    """What client `me` adds because of client `other`; what `other` adds because of `me` is its negative.

    private, public: of the two clients, one's private and the other's public key, either way round.
    """
    secret = X25519PrivateKey.from_private_bytes(private).exchange(X25519PublicKey.from_public_bytes(public))
    mask = _stream(_derive(secret, b"pair mask"), size)
    return mask if me < other else negative(mask)


def _stream(key, size):
    zeros = bytes(4 * size)
    stream = Cipher(ChaCha20(key, bytes(16)), None).encryptor().update(zeros)  # each key makes one stream only
    return torch.frombuffer(bytearray(stream), dtype=torch.int32) if size else torch.empty(0, dtype=torch.int32)


def _key_pair():
    private = X25519PrivateKey.generate()  # from the operating system's generator
    return private.private_bytes_raw(), private.public_key().public_bytes_raw()


# ---- numbers --------------------------------------------------------------------------------------------------


def largest(clients, fraction_bits=16):
    """The largest value that each of so many clients can bring without the sum leaving the field."""
    return (HALF - 1) // clients / 2**fraction_bits


def encode(values, clients, fraction_bits=16):
    """Real numbers as int32: fixed point, round(value · 2^fraction_bits), in two's complement modulo 2³².

    clients: how many vectors are to be added up at most. float64 holds every encoded number exactly.
    Raises ValueError for a value beyond `largest(clients, fraction_bits)`, where the sum could wrap, and for NaN.
    """
    most = largest(clients, fraction_bits)
    values = torch.as_tensor(values).detach().cpu().double()
    worst = values.abs().max().item() if values.numel() else 0.0
    if not worst <= most:
        raise ValueError(
            f"{worst:.6g} cannot be encoded: with {fraction_bits} bits for the fraction and {clients} clients a value "
            f"is at most {most:.6g}, or the sum could leave 32 bits. Use fewer fraction bits, or clip first"
        )
    scaled = (values * 2.0**fraction_bits).round()
    return scaled.clamp(-((HALF - 1) // clients), (HALF - 1) // clients).to(torch.int32)


def decode(total, fraction_bits=16):
    """The reals, float64, that an int32 sum stands for: exactly the sum of the rounded values."""
    return total.double() / 2.0**fraction_bits


def add(*tensors):
    """The sum modulo 2³², int32. Added up in 64 bits, where nothing overflows, and then wrapped."""
    total = sum(t.long() for t in tensors)
    return ((total + HALF) % FIELD - HALF).to(torch.int32)


def negative(tensor):
    """What added to `tensor` gives 0 modulo 2³²."""
    return add(torch.zeros_like(tensor), -tensor.long())
