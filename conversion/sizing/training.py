"""Memory for a step of training: what is kept between steps, what is kept for the backward pass, and its peak.

Formulas give the bytes that tensors hold on one device; letters are those of `shape.py`. c is the number of bytes of a
number that matrices are multiplied in, h that of a number of the residual stream.

The peak of a step is at one of four moments, each of which is counted:
- in the loss, where the sum of the head's gradient is float32 and nothing is given up yet;
- at the beginning of the backward pass, or in a layer that is computed anew under gradient checkpointing;
- at its end, in the first layer, when the gradients of all others are there;
- in the optimizer, which with AdamW of torch in its fused form takes nothing for itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

from .shape import Linear, Load, Shape

_PIECE, _BLOCK, _SLICE = 256, 16, 2**13  # of `loss_qwen`
_NF4_BLOCK, _NF4_NESTED = 64, 256  # weights that share a scale of one byte; such scales that share a float32
_NF4_TABLES = 4 * (16 + 256)  # the values of the codes of weights and of scales
_BUCKET = 5 * 10**8  # numbers that DeepSpeed gathers gradients of before it sends them, and brings together of weights
_LIVE = 10**9  # numbers of weights that DeepSpeed's ZeRO-3 has together at most


class Sharding(str, Enum):
    """What of a training is divided among the devices."""

    NONE = "none"
    ZERO2 = "ZeRO-2"
    ZERO3 = "ZeRO-3"
    FSDP2 = "FSDP2"


@dataclass(frozen=True)
class Way:
    """A way of training.

    Attributes:
        weights, gradients, optimizer: bytes for each number of what is trained.
        compute: c.
        residual: h.
        casts: matrices become c bytes for a step, beside what is stored.
        adapter: LoRA is trained and the model held as it is.
        nf4: held in four bits.
    """

    name: str
    weights: int
    gradients: int
    optimizer: int
    compute: int
    residual: int
    casts: bool = False
    adapter: bool = False
    nf4: bool = False
    sharding: Sharding = Sharding.NONE


WAYS = (
    Way("full, float32", 4, 4, 8, 4, 4),
    Way("full, mixed", 4, 4, 8, 2, 4, casts=True),
    Way("full, bfloat16", 2, 2, 4, 2, 2),
    Way("LoRA, bfloat16", 4, 4, 8, 2, 2, casts=True, adapter=True),
    Way("QLoRA, nf4", 4, 4, 8, 2, 4, casts=True, adapter=True, nf4=True),
    # DeepSpeed with bf16: the model in bf16 is whole or gathered; 4 bytes of the optimizer's 12 are the weights' own.
    Way("ZeRO-2, bfloat16", 2, 2, 12, 2, 2, sharding=Sharding.ZERO2),
    Way("ZeRO-3, bfloat16", 2, 2, 12, 2, 2, sharding=Sharding.ZERO3),
    Way("FSDP2, mixed", 4, 4, 8, 2, 2, sharding=Sharding.FSDP2),
    Way("FSDP2, float32", 4, 4, 8, 4, 4, sharding=Sharding.FSDP2),
)


@dataclass(frozen=True)
class Adapter:
    """Sizes of LoRA on every matrix of the layers.

    Attributes:
        dropout_mask: bytes that dropout keeps for each number: 1 on CUDA, 4 on a CPU, 0 without dropout.
    """

    rank: int = 64
    dropout_mask: int = 1

    def parameters(self, linears: Iterable[Linear]) -> int:
        """Of the adapters of some matrices."""
        return sum(self.rank * (linear.inputs + linear.outputs) for linear in linears)


@dataclass(frozen=True)
class TrainingNeed:
    """Bytes on each of the devices.

    Attributes:
        state: weights and what the optimizer keeps, between two steps.
        step: the most that a step takes beside it: gradients, activations, the loss.
    """

    state: int
    step: int

    @property
    def total(self) -> int:
        """Both."""
        return self.state + self.step


@dataclass(frozen=True)
class TrainingStep:
    """One step of training on one of so many devices.

    Attributes:
        checkpointing: layers keep their input only and are computed anew in the backward pass.
    """

    shape: Shape
    way: Way
    load: Load
    checkpointing: bool
    devices: int = 1
    adapter: Adapter = Adapter()

    @property
    def rows(self) -> int:
        """Texts on this device."""
        return -(-self.load.batch // self.devices)

    @property
    def tokens(self) -> int:
        """n."""
        return self.rows * self.load.context

    @property
    def need(self) -> TrainingNeed:
        """What the device holds at the peak."""
        return TrainingNeed(self.state, max(self.in_loss, self.backward_begins, self.backward_ends))

    # --- between two steps ---

    @property
    def trained(self) -> int:
        """Numbers that are trained."""
        if self.way.adapter:
            return self.shape.architecture.layers * self.adapter.parameters(self.shape.linears)
        return self.shape.parameters

    @property
    def state(self) -> int:
        """Weights, and what the optimizer keeps of each; and DDP's copy of the gradients, from which it sends them."""
        way, trained = self.way, self.trained
        if way.sharding is Sharding.ZERO2:
            return trained * way.weights + _share(trained * way.optimizer, self.devices)
        if way.sharding is not Sharding.NONE:
            return _share(trained * (way.weights + way.optimizer), self.devices)
        buckets = trained * way.gradients if self.devices > 1 else 0
        return self._held + trained * (way.weights + way.optimizer) + buckets

    @property
    def _held(self) -> int:
        """Weights that are not trained.

        nf4 with nested scales: half a byte for each weight, a byte for each 64 of them, a float32 for each 256 of
        those, and tables; everything else is float32, as `prepare_model_for_kbit_training` leaves it.
        """
        if not self.way.adapter:
            return 0
        if not self.way.nf4:
            return self.way.compute * self.shape.parameters
        packed = sum(_nf4(linear.weights) for linear in self.shape.linears) * self.shape.architecture.layers
        return packed + 4 * (self.shape.parameters - self.shape.in_linears)

    # --- what is kept for the backward pass ---

    @property
    def layer(self) -> int:
        """What a layer keeps.

        - the states before each norm, which is computed anew: 2hE;
        - queries, keys and values, what attention gives, and a float32 for each head: c(2Q + 2K) + 4H;
        - gate and up projection, of which the rest of the MLP is computed anew, 2cM; behind 4-bit matrices, which give
          back the float32 of the norms, 2 * 4M; under ZeRO-3, which hooks every module, SiLU and product too, 4cM;
        - of full training the inputs of the other matrices: the normed states, c(E + E), of which mixed precision casts
          the second twice;
        - of an adapter for each input of a matrix the copy that dropout gives and its mask, and the rank's numbers
          behind it;
        - matrices in c bytes, where they are cast, but for the last of the MLP, which is cast anew.
        """
        a, way, c = self.shape.architecture, self.way, self.way.compute
        linears = self.shape.linears
        attention = c * (2 * a.queries + 2 * a.keys) + 4 * a.heads
        states = 2 * way.residual * a.width
        if way.adapter:
            inputs = sum(linear.inputs for linear in linears) * (c + self.adapter.dropout_mask)
            kept = inputs + len(linears) * self.adapter.rank * c
        else:
            kept = c * (3 if way.casts else 2) * a.width
        again = 0 if way.adapter or not way.casts else linears[-1].weights * c
        return self.tokens * (states + attention + self._gates * self._gate + kept) + self._casts - again

    @property
    def _gates(self) -> int:
        """How many of gate, SiLU, up projection and product are kept; the others are there in the backward pass."""
        return 4 if self.way.sharding is Sharding.ZERO3 else 2

    @property
    def _gate(self) -> int:
        """Bytes of a token's gate, of its SiLU, of the up projection or of their product."""
        return self.shape.architecture.mlp * (4 if self.way.nf4 else self.way.compute)

    @property
    def _casts(self) -> int:
        """The matrices of a layer that are trained, in c bytes, where they are cast."""
        linears = self.shape.linears
        numbers = self.adapter.parameters(linears) if self.way.adapter else sum(linear.weights for linear in linears)
        return self.way.compute * numbers if self.way.casts else 0

    @property
    def layers(self) -> int:
        """What all layers keep, or their inputs where each is computed anew."""
        count = self.shape.architecture.layers
        return count * (self._inputs if self.checkpointing else self.layer)

    @property
    def _inputs(self) -> int:
        """The states that a layer is given."""
        return self.tokens * self.shape.architecture.width * self.way.residual

    @property
    def _angles(self) -> int:
        return 2 * 4 * self.load.context * self.shape.architecture.head_dim

    # --- the moments ---

    @property
    def in_loss(self) -> int:
        """While the loss is computed.

        - layers; states before and behind the last norm, 2hE; a copy of those that count and their gradient, 2cE;
          states and head in c bytes, where they are cast;
        - logits of a piece of 256 tokens, and two or three times those of 16 tokens in float32;
        - the head's gradient as a float32 sum, with the product of up to 8,192 rows that is added to it, which a
          CPU makes float32 first, or the whole that it is put together in;
        - under autocast with checkpointing the matrices of all layers, which it holds until the loss is there;
        - for a head that DeepSpeed has in shards the logits of all tokens instead.
        """
        way, c = self.way, self.way.compute
        a, n, matrix = self.shape.architecture, self.tokens, self.shape.matrix
        states = n * a.width * (2 * way.residual + 2 * c)
        if way.casts and way.residual != c:
            states += n * a.width * c + matrix * c  # of states and head
        if self.checkpointing:
            states += a.layers * self._casts  # autocast holds them until the loss is there
        if way.sharding is Sharding.ZERO3:
            return self.layers + states + self._angles + self._gathered(1) + self._plain_loss
        piece = min(n, _PIECE) * a.rows * c
        block = (2 if c == 4 else 3) * 4 * min(n, _BLOCK) * a.rows
        pieces = piece + block
        if not way.adapter:
            product = min(_SLICE, a.rows) * a.width * (c + 4) if c < 4 else 0
            pieces = 4 * matrix + max(pieces, piece + product, piece + c * matrix)
        return self.layers + states + self._angles + self._gathered(1) + pieces

    @property
    def _plain_loss(self) -> int:
        """Logits of all tokens, in float32 too, their logarithmic softmax and its gradient."""
        return self.tokens * self.shape.architecture.rows * (self.way.compute + 12)

    @property
    def _behind_loss(self) -> int:
        """What is kept behind the loss: states before and behind the last norm, their gradient, that of the head."""
        way, n = self.way, self.tokens
        head = 0 if way.adapter else self.shape.matrix * (way.compute if way.casts else min(way.gradients, way.compute))
        if way.sharding is Sharding.ZERO3:
            head = 0  # its gradient is divided at once
        return n * self.shape.architecture.width * (2 * way.residual + way.compute) + head + self._angles

    @property
    def backward_begins(self) -> int:
        """Layers and what is behind the loss, and the larger of the last norm and the MLP of the last layer.

        - The norm is computed anew, with its gradients: 22 bytes a number from half precision and 16 from float32.
        - The MLP's SiLU and product are computed anew, with their gradients, 4cM, or 2cM where they are kept. Of an
          adapter it is the SiLU, and gradients in float32 too, 8M and 4M more for dropout's; half of these the layer
          gives up meanwhile.
        - Under checkpointing all that a layer keeps is added.
        """
        a, way, n, c = self.shape.architecture, self.way, self.tokens, self.way.compute
        norm = n * a.width * (22 if way.residual < 4 else 16)
        mlp = n * (self._adapter_gradients if way.adapter else (6 - self._gates) * self._gate - c * a.width)
        base = self.layers + self._behind_loss + self._gathered(3)
        if self.checkpointing:
            return base + max(norm, self.layer - self._inputs + mlp)
        return base + max(norm, mlp // 2 + n * self._gate if way.adapter else mlp)

    @property
    def _adapter_gradients(self) -> int:
        """Of a token in the MLP."""
        return (12 if self.adapter.dropout_mask else 8) * self.shape.architecture.mlp

    @property
    def backward_ends(self) -> int:
        """All gradients, and what the first layer has and takes while it is its turn; or the embedding's.

        FSDP2 has embedding and head together then, whole: themselves, their gradients, and what it sends these from.
        """
        way, n = self.way, self.tokens
        a = self.shape.architecture
        gradients = self._gradients
        states = n * a.width * way.residual * 2
        mlp = n * (self._adapter_gradients if way.adapter else (6 - self._gates) * self._gate)
        first = gradients + self.layer + states + mlp
        if not way.adapter:  # those of this layer and of the embedding are still to come
            coming = self.shape.layer + self.shape.matrix * (self.shape.matrices - 1)
            first -= _share(coming * way.gradients, self._gradient_shares)
        if way.sharding is not Sharding.FSDP2 or self.devices == 1:
            return max(first, gradients + states) + self._gathered(5)
        ends = way.compute * self.shape.matrices * self.shape.matrix
        return max(first + way.compute * self.shape.matrix + self._gathered(5), gradients + states + 3 * ends)

    @property
    def _gradient_shares(self) -> int:
        return 1 if self.way.sharding is Sharding.NONE else self.devices

    @property
    def _gradients(self) -> int:
        """Of all that is trained."""
        return _share(self.trained * self.way.gradients, self._gradient_shares)

    def _gathered(self, layers: int) -> int:
        """What is whole for a while of what is divided.

        - FSDP2: embedding and head, and so many times a layer, in c bytes: in the loss the last layer; then the one at
          work, the next one, and what they are put together from; later also gradients and what these are sent from.
        - ZeRO-3: weights up to DeepSpeed's limit, and the gradients of a bucket.
        - ZeRO-2: a bucket of gradients, twice.
        """
        way, c = self.way, self.way.compute
        if way.sharding is Sharding.NONE or self.devices == 1 and way.sharding is Sharding.FSDP2:
            return 0
        if way.sharding is Sharding.FSDP2:
            return c * (layers * self.shape.layer + self.shape.matrices * self.shape.matrix)
        bucket = 2 * min(_BUCKET, self.shape.parameters)
        if way.sharding is Sharding.ZERO2:
            return 2 * bucket
        return c * min(_LIVE, self.shape.parameters) + bucket


def _share(nbytes: int, devices: int) -> int:
    return -(-nbytes // devices)


def _nf4(numbers: int) -> int:
    blocks = -(-numbers // _NF4_BLOCK)
    return -(-numbers // 2) + blocks + 4 * -(-blocks // _NF4_NESTED) + _NF4_TABLES
