"""Train an image classifier: python train.py rho=0.1 trainer.devices=4."""

from sam_lightning.config.process import importing

with importing():
    import hydra
    from omegaconf import DictConfig

    from sam_lightning.cli import guarded, run
    from sam_lightning.config.conf import MAIN


@hydra.main(config_path="conf", config_name="train", **MAIN)
def main(cfg: DictConfig) -> float | None:
    """Compose the configuration, check it, then load torch and train."""
    return run(cfg)


if __name__ == "__main__":
    guarded(main)
