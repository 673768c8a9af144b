# docker build -t fledge . && docker run --gpus all -v $PWD/runs:/work/runs fledge demo
# torch's wheels bring CUDA along; a compiler is for Triton's launchers.
FROM python:3.12-slim
RUN apt-get update && apt-get install --yes --no-install-recommends gcc g++ git make && rm -rf /var/lib/apt/lists/*
COPY . /opt/fledge
RUN pip install --no-cache-dir --constraint /opt/fledge/constraints.txt '/opt/fledge[adapters,images,quantized,tensorboard]'
WORKDIR /work
ENTRYPOINT ["fledge"]
