-- holder
go_on_when_full()
redis.call('HDEL', GPUS, ARGV[2])
return 0
