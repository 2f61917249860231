"""Where exemplars come from: folders, Parquet files, data sets, arrays -> a stream of decoded, checked images."""
