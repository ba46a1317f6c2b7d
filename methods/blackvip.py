"""BlackVIP: a network on the client makes a prompt for each image, trained by SPSA with momentum from scores alone.

What is learned: w, the parameters of a decoder (`_coordinator.py`) that makes a prompt from a code of the image and a
learned trigger: 9,920 numbers for images of side 224. The code is that of a frozen encoder on the client.
Shapes: N training images, B images in a batch, C classes, S side of the model's input, Z width of a code, d numbers
learned, J directions, P = 2 J image sets in a step.
Cost: a step sends P requests, P * B images, P * C prompts, P * B * C outputs; J = 5, B = min(128, N): 10 requests,
1,280 images. The published schedule of 16-shot EuroSAT is 5,000 steps: 50,000 requests, 6,400,000 images. The default
is 100 epochs. A smaller allotment pays for fewer steps of the same size; the step sizes (2) do not depend on their
number. Without any steps, the images stay the plain ones. Prediction: 1 request, each image once.
Paper: Oh et al., BlackVIP: Black-Box Visual Prompting for Robust Transfer Learning, CVPR 2023, arXiv:2303.14773, as in
its released trainers/blackvip.py. With h the decoder, z the encoder, s CLIP's standard deviation of pixels, i = 1, 2,
... the step, and g the two-sided estimate of `_spsa.py` (1):

    x' = clip(x + eps s h_w(z(x)), 0, 1)                                (1)
    a_i = 0.01 / (i + 1)^0.4,   c_i = c / i^gamma                       (2)
    m <- beta m + g,   w <- w - a_i (g + beta m)       (m starts at 0)  (3)

Batch normalization uses the batch in training and running means in prediction; each of the P image sets of a step moves
the running means. The text is the data set's template, as for zero-shot.

Departures from the released code:
1. The encoder. The paper's is a pretrained ViT-MAE. Here it is a fixed random projection of 8x8 thumbnails. With
   `random_encoder`, it is the release's own network without pretraining (its coordinator_init), whose weights stay
   random there too; the decoder then has no trigger (9,120 numbers).
2. Images are sent with 8 bits a channel, as to a service; the release passes float tensors. docs/methods/blackvip.md
   shows what that does to the estimate.
3. For other sides than 224, the decoder's input has the side ceil(S / 32), not 7.
4. One fixed view of the training images; the release augments each batch anew: `views=fresh`.
5. float32; the release computes in float16 (autocast).
6. Without any steps, the images are the plain ones. With steps, training starts at a random decoder, as in the release.
"""

from __future__ import annotations

from dataclasses import dataclass

from methods._coordinator import Decoder, RandomEncoder, ThumbnailEncoder, grid_side, trigger_width
from methods._pixel_prompts import CLIP_MEAN, CLIP_STD, SPSAPrompt, per_channel
from methods._torch import Tensor
from methods.base import Access, ImageSet, method


@method(name="blackvip", access=Access.TEXT | Access.PIXELS | Access.SCORES, paper="arXiv:2303.14773")
class BlackVIP(SPSAPrompt):
    """A prompt for each image, made by a network on the client that SPSA trains."""

    @dataclass(frozen=True, kw_only=True)
    class Config(SPSAPrompt.Config):
        """The release's default settings; its table for each data set is used with hparams=paper."""

        prompt_scale: float = 1.0
        """eps: weight of the prompt."""
        random_encoder: bool = False
        """Use the release's network without pretraining, in place of projected thumbnails."""

    config: Config

    def initial(self, size: int) -> Tensor:
        trigger = 0 if self.config.random_encoder else trigger_width(size)
        self.encoder = (
            RandomEncoder(size, self.generator)
            if self.config.random_encoder
            else ThumbnailEncoder(32 * grid_side(size) ** 2 - trigger, self.generator)
        )
        self.decoder = Decoder(size, trigger)
        return self.decoder.initial(self.generator)

    def read(self, images: ImageSet, training: bool) -> tuple[Tensor, ...]:
        """Return the images and their codes [B, Z], the same for all parameters of a step."""
        x_B3SS = images.array(self.size)
        normalized_B3SS = (x_B3SS - per_channel(CLIP_MEAN)) / per_channel(CLIP_STD)
        return x_B3SS, self.encoder(normalized_B3SS, self.n_sets() if training else 0)

    def made(self, w_d: Tensor, *read: Tensor, training: bool) -> Tensor:
        x_B3SS, code_BZ = read
        prompt_B3SS = self.decoder(w_d, code_BZ, training)
        return (x_B3SS + self.config.prompt_scale * per_channel(CLIP_STD) * prompt_B3SS).clamp(0, 1)  # (1)

    def deployed(self) -> dict[str, Tensor]:
        return {"w_d": self.w_d} | self.encoder.tensors() | self.decoder.tensors()
