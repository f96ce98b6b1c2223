"""What every test shares: one thread, so that small networks do not fight over two cores."""

import torch

torch.set_num_threads(1)
