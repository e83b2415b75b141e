"""The papers behind a model, found from its method and settings, as BibTeX entries for its card."""

from typing import Any


DDPM = """@inproceedings{ho2020denoising,
  title={Denoising Diffusion Probabilistic Models}, author={Ho, Jonathan and Jain, Ajay and Abbeel, Pieter},
  booktitle={NeurIPS}, year={2020}, eprint={2006.11239}, archivePrefix={arXiv}
}"""
DDIM = """@inproceedings{song2021denoising,
  title={Denoising Diffusion Implicit Models}, author={Song, Jiaming and Meng, Chenlin and Ermon, Stefano},
  booktitle={ICLR}, year={2021}, eprint={2010.02502}, archivePrefix={arXiv}
}"""
IMPROVED_DDPM = """@inproceedings{nichol2021improved,
  title={Improved Denoising Diffusion Probabilistic Models}, author={Nichol, Alex and Dhariwal, Prafulla},
  booktitle={ICML}, year={2021}, eprint={2102.09672}, archivePrefix={arXiv}
}"""
ADM = """@inproceedings{dhariwal2021diffusion,
  title={Diffusion Models Beat GANs on Image Synthesis}, author={Dhariwal, Prafulla and Nichol, Alex},
  booktitle={NeurIPS}, year={2021}, eprint={2105.05233}, archivePrefix={arXiv}
}"""
CLASSIFIER_FREE = """@misc{ho2022classifier,
  title={Classifier-Free Diffusion Guidance}, author={Ho, Jonathan and Salimans, Tim},
  year={2022}, eprint={2207.12598}, archivePrefix={arXiv}
}"""
V_PREDICTION = """@inproceedings{salimans2022progressive,
  title={Progressive Distillation for Fast Sampling of Diffusion Models}, author={Salimans, Tim and Ho, Jonathan},
  booktitle={ICLR}, year={2022}, eprint={2202.00512}, archivePrefix={arXiv}
}"""
MIN_SNR = """@inproceedings{hang2023efficient,
  title={Efficient Diffusion Training via Min-SNR Weighting Strategy},
  author={Hang, Tiankai and Gu, Shuyang and Li, Chen and Bao, Jianmin and Chen, Dong and Hu, Han and Geng, Xin and Guo, Baining},
  booktitle={ICCV}, year={2023}, eprint={2303.09556}, archivePrefix={arXiv}
}"""
P2 = """@inproceedings{choi2022perception,
  title={Perception Prioritized Training of Diffusion Models},
  author={Choi, Jooyoung and Lee, Jungbeom and Shin, Chaehun and Kim, Sungwon and Kim, Hyunwoo and Yoon, Sungroh},
  booktitle={CVPR}, year={2022}, eprint={2204.00227}, archivePrefix={arXiv}
}"""
ZERO_SNR = """@inproceedings{lin2024common,
  title={Common Diffusion Noise Schedules and Sample Steps Are Flawed}, author={Lin, Shanchuan and Liu, Bingchen and Li, Jiashi and Yang, Xiao},
  booktitle={WACV}, year={2024}, eprint={2305.08891}, archivePrefix={arXiv}
}"""
DDGAN = """@inproceedings{xiao2022tackling,
  title={Tackling the Generative Learning Trilemma with Denoising Diffusion GANs}, author={Xiao, Zhisheng and Kreis, Karsten and Vahdat, Arash},
  booktitle={ICLR}, year={2022}, eprint={2112.07804}, archivePrefix={arXiv}
}"""
SCORE_SDE = """@inproceedings{song2021score,
  title={Score-Based Generative Modeling through Stochastic Differential Equations},
  author={Song, Yang and Sohl-Dickstein, Jascha and Kingma, Diederik P. and Kumar, Abhishek and Ermon, Stefano and Poole, Ben},
  booktitle={ICLR}, year={2021}, eprint={2011.13456}, archivePrefix={arXiv}
}"""
F_GAN = """@inproceedings{nowozin2016fgan,
  title={f-GAN: Training Generative Neural Samplers using Variational Divergence Minimization},
  author={Nowozin, Sebastian and Cseke, Botond and Tomioka, Ryota},
  booktitle={NeurIPS}, year={2016}, eprint={1606.00709}, archivePrefix={arXiv}
}"""
WASSERSTEIN = """@inproceedings{arjovsky2017wasserstein,
  title={Wasserstein Generative Adversarial Networks}, author={Arjovsky, Martin and Chintala, Soumith and Bottou, L{\\'e}on},
  booktitle={ICML}, year={2017}, eprint={1701.07875}, archivePrefix={arXiv}
}"""
R1 = """@inproceedings{mescheder2018which,
  title={Which Training Methods for GANs do actually Converge?}, author={Mescheder, Lars and Geiger, Andreas and Nowozin, Sebastian},
  booktitle={ICML}, year={2018}, eprint={1801.04406}, archivePrefix={arXiv}
}"""
WGAN_GP = """@inproceedings{gulrajani2017improved,
  title={Improved Training of Wasserstein GANs},
  author={Gulrajani, Ishaan and Ahmed, Faruk and Arjovsky, Martin and Dumoulin, Vincent and Courville, Aaron},
  booktitle={NeurIPS}, year={2017}, eprint={1704.00028}, archivePrefix={arXiv}
}"""
SPECTRAL_NORM = """@inproceedings{miyato2018spectral,
  title={Spectral Normalization for Generative Adversarial Networks},
  author={Miyato, Takeru and Kataoka, Toshiki and Koyama, Masanori and Yoshida, Yuichi},
  booktitle={ICLR}, year={2018}, eprint={1802.05957}, archivePrefix={arXiv}
}"""


def citations(method: str, config: dict[str, Any]) -> list[str]:
    """BibTeX entries of what a run of `train_<method>.py` with these settings has used, in the order of publication of their ideas."""
    get = config.get
    if method == "ddgan":
        used = {
            DDGAN: True,
            SCORE_SDE: True,  # NCSN++, the generator
            F_GAN: get("divergence") in ("hellinger", "reverse_kl", "total_variation"),
            WASSERSTEIN: get("divergence") == "wasserstein",
            R1: get("r1_gamma") != 0,
            WGAN_GP: bool(get("wgan_gp")),
            SPECTRAL_NORM: bool(get("spectral_norm")),
        }
    else:
        used = {
            DDPM: True,
            DDIM: get("sampler") == "ddim",
            IMPROVED_DDPM: get("beta_schedule") == "squaredcos_cap_v2"
            or get("objective") in ("hybrid", "vlb")
            or get("timestep_sampling") == "loss_second_moment",
            ADM: True,  # the U-Net, and its half that classifies
            CLASSIFIER_FREE: bool(get("class_conditional") and get("label_dropout")),
            V_PREDICTION: get("prediction_type") == "v_prediction",
            MIN_SNR: get("loss_weighting") == "min_snr",
            P2: get("loss_weighting") == "p2",
            ZERO_SNR: bool(get("rescale_betas_zero_snr")),
        }
    return [entry for entry, is_used in used.items() if is_used]
