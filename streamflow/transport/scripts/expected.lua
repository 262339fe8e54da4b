-- number of images, work of each image ... -> for each work, seconds or '' while there is nothing fresh to go by
local _, images = unpack(ARGV, 1, 2)
local ahead = work_before(redis.call('ZCARD', WAITING))
local expected = {}
for i = 3, #ARGV do
  local expected_s, fresh = estimate(ahead, tonumber(ARGV[i]), tonumber(images))
  expected[#expected + 1] = fresh and seconds(expected_s) or ''
end
return expected
